"""What finished studies say: figures read from their folders, statistics over seeds, tables and pages as text."""
