"""What a network is made of: layers, groups of coupled channels, attention heads, blocks."""
