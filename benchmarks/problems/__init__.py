"""What is measured: heads, batches, hidden states, the floor and the competitors."""
