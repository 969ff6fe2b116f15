"""What a model answered, who judges it, and what a suite of prompts says about a model."""
