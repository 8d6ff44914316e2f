"""The store: immutable segments behind six verbs, and an index that can be made anew from them."""
