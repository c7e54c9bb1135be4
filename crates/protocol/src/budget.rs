//! What agents have spent, and how much they may spend before their project is paused.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pause::PauseCause;

/// Tokens and money that an agent reported to have used, summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Tokens sent to the model.
    pub input_tokens: u64,
    /// Tokens that the model wrote.
    pub output_tokens: u64,
    /// Cost in millionths of a US dollar.
    pub cost_micro_usd: u64,
}

impl Usage {
    /// Returns both kinds of tokens together.
    pub fn tokens(&self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }

    /// Adds another one, without overflow.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            cost_micro_usd: self.cost_micro_usd.saturating_add(other.cost_micro_usd),
        }
    }
}

/// How much may be spent. What is left out is not bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Tokens, to and from the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Cost in millionths of a US dollar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_micro_usd: Option<u64>,
    /// Whether a person let the project go on over this budget; it then bounds nothing until a new
    /// budget is set.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub waived: bool,
}

impl Budget {
    /// Says whether it is left out.
    pub fn is_unset(&self) -> bool {
        *self == Self::default()
    }

    /// Says which bound is reached; tokens come first.
    pub fn reached(&self, spent: &Usage) -> Option<PauseCause> {
        if self.waived {
            return None;
        }
        if self.tokens.is_some_and(|bound| spent.tokens() >= bound) {
            return Some(PauseCause::TokenBudget);
        }
        self.cost_micro_usd.is_some_and(|bound| spent.cost_micro_usd >= bound).then_some(PauseCause::CostBudget)
    }
}
