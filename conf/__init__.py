"""Configuration files of the verbs, composed by Hydra; `shared/` holds the keys that several verbs have."""
