//! The seeds of random tests. The seed is fixed, so that a commit always gives the same result, unless the environment
//! sets another one.
//!
//! | variable | value | effect |
//! |---|---|---|
//! | `FERMATA_TEST_SEED` | unset | the fixed seed |
//! | | `random` | another seed in every process; a test that fails shows it |
//! | | a number | that seed |
//! | `FERMATA_TEST_CASES` | a number | property tests run that many times as many cases |
//!
//! A property test that fails writes the input into `proptest-regressions/` of its package, from where every later run
//! reads it. Other random tests keep a list of seeds beside their source.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use proptest::test_runner::{Config, RngSeed};

/// Names the variable that sets the seed.
const SEED: &str = "FERMATA_TEST_SEED";

/// Names the variable that multiplies the cases of property tests.
const CASES: &str = "FERMATA_TEST_CASES";

/// The seed that is used unless the environment sets another one.
pub const FIXED: u64 = 20_260_401;

/// A seed and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seed {
    /// The environment sets no seed.
    Fixed,
    /// The environment sets this seed, or `random`.
    Chosen(u64),
}

static CHOSEN: LazyLock<Seed> = LazyLock::new(|| match env::var(SEED).as_deref() {
    Err(_) | Ok("") => Seed::Fixed,
    Ok("random") => Seed::Chosen(RandomState::new().hash_one(SEED)),
    Ok(number) => Seed::Chosen(number.parse().unwrap_or_else(|error| panic!("{SEED}={number}: {error}"))),
});

/// Returns the seed of this process.
///
/// # Panics
/// When `FERMATA_TEST_SEED` is neither `random` nor a number.
pub fn seed() -> Seed {
    if let Seed::Chosen(seed) = *CHOSEN {
        // The test harness prints this when the test fails.
        println!("{SEED}={seed}");
    }
    *CHOSEN
}

/// Returns the configuration of a property test with that many cases.
///
/// # Panics
/// When the environment holds a seed or a factor that is no number.
pub fn cases(cases: u32) -> Config {
    let factor = match env::var(CASES) {
        Ok(number) => number.parse().unwrap_or_else(|error| panic!("{CASES}={number}: {error}")),
        Err(_) => 1,
    };
    let seed = match seed() {
        Seed::Fixed => FIXED,
        Seed::Chosen(seed) => seed,
    };
    Config { cases: cases.saturating_mul(factor), rng_seed: RngSeed::Fixed(seed), ..Config::default() }
}
