"""Pages for people: one self-contained HTML file each, which loads nothing from a network."""
