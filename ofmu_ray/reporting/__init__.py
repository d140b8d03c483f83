"""What a run writes for people: the HTML page, the model card and the manifest. Loads no torch."""
