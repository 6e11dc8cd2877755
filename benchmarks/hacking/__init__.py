"""The laboratory of benchmarks/reward_hacking.py: a language with a gold reward, a learned proxy, arms, runs, a report."""
