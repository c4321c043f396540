"""GitHub's API: what the bot reads from it and says through it, without a checkout."""
