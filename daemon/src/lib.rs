//! The library behind `fermatad` and `fermata-plugin-host`.
//!
//! The modules are listed in the order in which they may import each other: downwards only. The blank lines keep rustfmt
//! from sorting them; the tidy test checks the imports.
#![deny(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::wildcard_enum_match_arm))]

pub mod server;

pub mod socket;

pub mod auth;

pub mod recovery;

pub mod pressure;

pub mod project;

pub mod operations;

pub mod services;

pub mod store;

pub mod tokens;

pub mod load;

pub mod plugins;

pub mod shims;

pub mod profile;

pub mod config;

pub mod hashing;

pub mod errors;
