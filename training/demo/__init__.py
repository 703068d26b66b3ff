"""`hub demo`: the whole product on the embedded model, from data to a merged model, in one sitting."""
