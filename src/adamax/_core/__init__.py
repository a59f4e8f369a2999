"""What all front ends share: the rule, exact updates and the verbs. NumPy only."""
