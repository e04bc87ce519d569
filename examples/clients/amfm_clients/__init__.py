"""Other programs on an export: what each makes of it, compared with transformers. The scripts run where the program is
installed.
"""
