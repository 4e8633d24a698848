"""Methods that leave an FFN fewer neurons, or a lower rank."""
