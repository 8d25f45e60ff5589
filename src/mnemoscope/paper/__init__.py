"""What only the paper needs: made-up tasks, training from scratch, comparisons of seeds and tasks."""
