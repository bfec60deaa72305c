"""AEPO in TRL (docs/trl.md)."""
