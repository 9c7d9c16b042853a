"""The page that shows an inspection."""
