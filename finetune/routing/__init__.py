"""Which experts the data uses: profiled, scored, chosen into a plan, and watched while they train."""
