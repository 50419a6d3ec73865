"""Memory and time of a recipe before it runs, told from configs and launch files alone (`sara plan`)."""
