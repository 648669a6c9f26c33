def abstract_items(version, items): return items
def migrate(version, items, placed): return items
