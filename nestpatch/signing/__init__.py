"""Who made a pack: keys, detached signatures, and whom this machine trusts (docs/signing.md)."""
