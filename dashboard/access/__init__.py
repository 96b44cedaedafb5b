"""Access control: users, sessions, the login, and the checks of each request."""
