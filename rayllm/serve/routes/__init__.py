"""The paths of the HTTP application, a module for each group, and what their endpoints share."""
