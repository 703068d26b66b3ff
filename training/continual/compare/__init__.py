"""`hub continual compare`: strategies side by side over orders and seeds, run by run, kept, and written up."""
