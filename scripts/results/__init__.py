"""The records in results/, and the tables and figures that are made from them."""
