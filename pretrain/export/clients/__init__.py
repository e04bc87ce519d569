"""Other programs on an export: what each makes of it, beside transformers. The scripts run where the program is installed."""
