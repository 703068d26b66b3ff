"""What callers say of answers: remembered for a while, stored when marked, read again for training. Off by default."""
