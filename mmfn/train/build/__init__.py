"""From a config to what a run needs. Everything a user can get wrong is found here."""
