"""The configuration: yaml files with the choices of each group, and `conf.schema` with the types of all keys."""
