"""RELEASE: ledger, gates, canary and the Ray Serve applications that carry users."""
