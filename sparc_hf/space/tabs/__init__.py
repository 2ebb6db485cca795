"""What the tabs of the page are made of."""
