//! Budgets through the whole of `decide` and `apply`.

use fermata_protocol::Code;
use fermata_protocol::agent::Usage;
use fermata_protocol::budget::Budget;
use fermata_protocol::pause::{PauseCause, PauseMode};
use fermata_protocol::project::ProjectConfig;

use super::model::*;
use crate::command::{Command, Effect};

fn usage(tokens: u64) -> Usage {
    Usage { input_tokens: tokens, output_tokens: 0, cost_micro_usd: 0 }
}

fn set(config: &ProjectConfig) -> Command {
    Command::Set { description: None, phase: None, config: Some(config.clone()) }
}

/// Reports usage and says whether a pause follows from it.
fn pauses(model: &mut Model, agent: u8, tokens: u64) -> bool {
    model.tell(Command::Use { agent: name(agent), usage: usage(tokens) }).expect("accepted");
    let asked = model.pending.contains(&Effect::PauseForBudget {});
    model.settle();
    asked
}

fn resume(model: &mut Model, over_budget: bool) -> Result<(), fermata_protocol::Refusal> {
    let (operation, respawn) = (model.operation(), model.respawns(false));
    model.tell(Command::Resume { operation, respawn, over_budget })
}

#[test]
fn a_budget_that_is_reached_pauses_and_a_resume_needs_more_of_it() {
    let mut model = Model::new();
    let budget = Budget { tokens: Some(100), ..Budget::default() };
    let config = ProjectConfig { budget, ..ProjectConfig::default() };
    model.tell(set(&config)).expect("accepted");
    for agent in [0, 1] {
        let mut spec = spec(agent);
        spec.supervision = Default::default();
        let new = model.new_run();
        model.tell(Command::Run { agent: name(agent), spec, new }).expect("it may run");
        model.settle();
    }
    assert!(!pauses(&mut model, 0, 60));
    // Who is removed takes nothing of it along.
    let run = model.run_of(&name(0)).expect("it runs");
    model.end(&run, 0);
    model.report_end(name(0), run);
    model.settle();
    model.tell(Command::RemoveAgent { agent: name(0) }).expect("it has ended");
    assert!(pauses(&mut model, 1, 40));
    let (operation, cause) = (model.operation(), PauseCause::TokenBudget);
    let pause = Command::Pause { operation, cause, reason: None, mode: PauseMode::Freeze, grace_ms: None };
    model.tell(pause).expect("it is active");
    model.settle();
    // A report that comes late asks for nothing more.
    assert!(!pauses(&mut model, 1, 1));
    assert_eq!(resume(&mut model, false).expect_err("the budget is reached").code, Code::BudgetExceeded);
    resume(&mut model, true).expect("a person wants it");
    model.settle();
    assert!(!pauses(&mut model, 1, 50), "it is waived");
    model.tell(set(&config)).expect("accepted");
    assert!(pauses(&mut model, 1, 1), "a budget that is set anew counts");
    assert_eq!(model.project.counters.removed_usage, usage(60));
}
