"""A folder on the path of the tools that ``ffnkit exec`` runs."""
