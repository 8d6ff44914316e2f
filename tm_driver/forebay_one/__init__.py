"""The OpenNebula datastore and transfer-manager driver; it may import only forebay_core and forebay_wire."""
