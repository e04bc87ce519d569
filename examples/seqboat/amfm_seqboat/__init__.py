"""SeqBoat as a mixer of amfm."""
