"""The provider: clients of Quiltt's APIs and its wire format."""
