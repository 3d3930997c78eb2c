"""The sample corpora and the tokenizer that come with Detour; SOURCE.md names their origin and licences."""
