"""What an early depth says, and when to believe it."""
