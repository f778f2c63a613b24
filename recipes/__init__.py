"""Training recipes; one file a recipe. Installs as `bptoolkit.recipes`."""
