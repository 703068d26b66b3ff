"""How an older catalog becomes today's: Alembic revisions, oldest first."""
