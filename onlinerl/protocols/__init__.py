"""The roles: one file each, with everything that anybody calls on it. Import from the role's own file."""
