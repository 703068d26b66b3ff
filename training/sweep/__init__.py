"""`hub sweep`: grids of recipes, tasks and seeds, run cell by cell, resumed, scored and written up."""
