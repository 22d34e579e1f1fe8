"""The recurrence of linear memories over grouped rows; see api.py."""
