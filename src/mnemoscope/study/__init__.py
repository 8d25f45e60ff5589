"""Studies: cells of stages that write raw records, run in parallel, resumed where they stopped."""
