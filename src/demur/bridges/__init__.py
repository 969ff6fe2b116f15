"""demur inside other people's evaluation programs. Nothing heavy is imported here."""
