"""Branched rollouts of AEPO inside TRL: the rules, the waves of generation, tools and environments (docs/trl.md)."""
