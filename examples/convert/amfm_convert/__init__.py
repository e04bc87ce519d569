"""Conversion of a trained model's attention: plan of the stages, what each trains, measurement and report."""
