"""Measurements: `python -m bench NAME [--quick] [--json FILE]`. See bench/contract.py for what each prints."""
