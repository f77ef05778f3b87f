"""The configuration tree: yaml for people, `conf.schema` for types."""
