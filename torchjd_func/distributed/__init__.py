"""Rules over several processes."""
