"""What a running job says of itself: metrics, anomalies, heartbeats, display."""
