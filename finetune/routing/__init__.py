"""Which experts the data uses: plans now; profiling, scoring and selecting build on them."""
