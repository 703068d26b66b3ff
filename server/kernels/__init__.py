"""The numeric operations: plain-torch meaning beside the fast versions. Imports nothing of ours."""
